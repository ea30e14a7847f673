"""ONNX files read, queried, and evaluated in numpy: exactly in float64, or with the roundings of a precision."""
