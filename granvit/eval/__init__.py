"""What a trained model answers, and how it looks."""
