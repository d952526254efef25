"""How the encoders in demo/encoders were trained."""
