"""The methods that act on the call of a network rather than on its layers: prompt learning."""
