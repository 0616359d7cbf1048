"""The model of the recipe: a stock LLaVA, assembled from parts and trained on packed images and questions."""
