"""Folding of BatchNormalization in an existing ONNX file, by the rules of ``bnexport.folding``."""
