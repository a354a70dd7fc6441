"""swiftbalancer inside vllm-ascend.

Model Runner V1 gets an updator of ours in place of its `EplbUpdator`; Model Runner V2 runs vLLM's `EplbState` and
needs only its routing tables refreshed. Nothing here imports torch_npu: vllm-ascend has done so.
"""
