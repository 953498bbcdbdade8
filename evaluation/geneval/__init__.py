"""GenEval: prompts, rules, detectors and colour classifier, scores and result files; the ShapesWorld checker."""
