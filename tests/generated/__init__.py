"""What Hypothesis makes up for tests."""
