"""Load on a server process over loopback, see __main__.py."""
