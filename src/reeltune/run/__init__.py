"""What a recipe reads, and the run's folder."""
