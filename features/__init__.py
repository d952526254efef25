"""From files to the stored outputs of the frozen blocks: encoders, pixels, the store. Also trained models."""
