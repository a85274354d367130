"""What a person types: requests are read (requests), answers grow (answers), a pipeline runs both on the model (pipeline)."""
