"""The verbs of the command line, one file each: `add` describes its options, `run` does it."""
