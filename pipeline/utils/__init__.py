"""Helpers for every room: files, signals, devices, durations, redaction of secrets.

Imports: errors.
"""
