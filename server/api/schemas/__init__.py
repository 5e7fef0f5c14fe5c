"""Request and response models of the API. Unknown parameters are errors."""
