"""From text to token numbers and back, and which bytes each token stands for."""
