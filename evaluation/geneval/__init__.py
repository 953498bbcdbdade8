"""GenEval: detection types, decision rules, prompt metadata and the ShapesWorld checker."""
