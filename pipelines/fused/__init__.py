"""Forward passes and attention processors that run the fused kernels in stock models."""
