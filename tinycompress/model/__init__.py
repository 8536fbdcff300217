"""The transformer built from a graph: forward, KV cache, generation; fused_ops, matmul and cpu_memory are speed
only."""
