"""The model of the recipe: a stock LLaVA, assembled from parts."""
