"""What a pass is, and what runs, checks and observes passes."""
