"""The definition of a pass, and the pass manager, which runs and checks passes and lets observers watch."""
