"""What Flower loads on the SuperLink and on each SuperNode."""

from jacnorm.studies.fedgtst import deployed

client = deployed.client()
server = deployed.server()
