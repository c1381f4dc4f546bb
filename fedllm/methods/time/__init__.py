"""Methods that do not wait: late answers, deadlines, partial work."""
