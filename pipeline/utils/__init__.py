"""What every room may use: files, signals, devices, texts without secrets.

Imports: errors.
"""
