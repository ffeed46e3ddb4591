"""A compiler-style rewriter of PyTorch models over torch.fx."""
