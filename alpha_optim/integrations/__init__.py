"""Edges that read: loggers and callbacks of other frameworks. Import the one you need by its module."""
