"""See vllm."""

TokensPrompt = dict
