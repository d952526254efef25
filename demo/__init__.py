"""Cartoon scenes in VQA v2's layout, what made the two small encoders, the trained model, and a page to ask it."""
