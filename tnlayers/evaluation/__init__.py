"""What a model is worth: perplexity, similarity of embeddings, accuracy, speed and memory, before and after."""
