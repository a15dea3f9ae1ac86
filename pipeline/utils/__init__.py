"""Helpers for every room: files, signals, devices, redaction of secrets.

Imports: errors.
"""
