"""What a step computes and sends, counted without data or other ranks: one rank of the real code on fake tensors."""
