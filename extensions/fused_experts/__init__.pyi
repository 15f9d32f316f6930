from loraweave.extensions.fused_experts.running import watched as watched
