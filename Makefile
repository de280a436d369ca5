PYTHON ?= python
PROTO := $(sort $(wildcard proto/deltaserve/v1/*.proto))
STUBS ?= proto

.PHONY: stubs
stubs:  ## regenerate the stubs of proto/deltaserve/v1 (into STUBS)
	$(PYTHON) -m grpc_tools.protoc -Iproto --python_out=$(STUBS) --pyi_out=$(STUBS) \
	    --grpc_python_out=$(STUBS) --mypy_grpc_out=$(STUBS) $(PROTO)
