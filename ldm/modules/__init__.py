"""The networks: plain nn.Modules, without training or sampling."""
