"""Systems to compare with. A module's docstring goes with its results: it says what the system is and is not.

Each has ``open_session(args, setting)``, which makes what opens a Session, or ``measure(args, setting)`` of its own.
"""
