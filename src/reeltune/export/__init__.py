"""`reeltune export`: weights under the released or diffusers' names, read back and compared."""
