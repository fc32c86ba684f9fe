"""What the user's own forward and backward passes show."""
