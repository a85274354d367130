"""Answer what a person types: read the request (requests), run the model (pipeline), write the answer (answers)."""
