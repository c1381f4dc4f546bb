"""Any Hugging Face model: tiny random ones of many architectures, each trained here and in plain transformers."""
