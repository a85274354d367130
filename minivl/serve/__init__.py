"""A service: requests of many clients written together, over the HTTP API that OpenAI's client speaks."""
