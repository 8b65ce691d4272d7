"""One file a command of the command line: its flags, and what it prints."""
