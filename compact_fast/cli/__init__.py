"""The command `compact-fast`: one file a verb, nothing heavy imported before a verb runs."""
