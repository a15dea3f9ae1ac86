"""The pack: one task's model as a file of a few kilobytes. numpy and safetensors only."""
