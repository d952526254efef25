"""The embedded default: cartoon scenes in VQA v2's layout, and what made its two small encoders."""
