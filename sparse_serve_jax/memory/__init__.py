"""The two-tier KV cache and the allocator of its DRAM blocks."""
