"""hybridlab: understand, measure and beat launch overhead in LLM inference."""
