"""ShapesWorld: a procedural text-to-image data set in the GenEval grammar."""
