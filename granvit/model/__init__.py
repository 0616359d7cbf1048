"""GranViT on stock transformers classes: vision towers, packed sequences, and the model that trains on them."""
