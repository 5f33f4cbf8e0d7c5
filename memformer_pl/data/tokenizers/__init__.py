"""Convert text to token numbers and back, and find the bytes that each token stands for."""
