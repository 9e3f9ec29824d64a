"""Results as tables, files and runs of trackers: one file per target."""
