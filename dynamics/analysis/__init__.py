"""Who does the work: what is chosen of a run, measured, kept and compared."""
