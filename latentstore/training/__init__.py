"""Scripts that make the built-in encoders' weights from photographs."""
