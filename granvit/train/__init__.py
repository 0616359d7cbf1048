"""Training: recipes, what a run will cost before it starts, and the run itself."""
